"""Privacy accounting that server, site and simulation share."""
