"""The commands of ``medfl-server``, one file each: ``add`` declares it; heavy imports wait for its work."""
