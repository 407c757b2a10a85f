"""The maintenance commands, one module each; `pipeline/cli.py` calls them.

They may import workspace, layout, settings, stages and storage; nothing imports them but the CLI.
"""
