"""The commands of ``medfl-client``, one file each: ``add`` declares it; heavy imports wait for its work."""
