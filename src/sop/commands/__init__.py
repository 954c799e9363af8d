"""The subcommands of `sop`, a module per group; each adds its own with `add_commands` and imports late."""
