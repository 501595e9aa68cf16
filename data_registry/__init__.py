"""What a thing is: databases and sites, tables, label protocols, volumes, the standard grid, shards, splits."""
