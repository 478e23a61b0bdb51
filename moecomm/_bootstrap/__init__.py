"""How ranks that are processes find each other: launchers, groups, and sockets of the library's own."""
