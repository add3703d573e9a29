"""Speaks to users: the HTTP server, its public faces, deployed functions on disk, the daemon and its client."""
