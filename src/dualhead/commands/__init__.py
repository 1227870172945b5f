"""The command line: commands, and their output in a terminal."""
