"""What a run looks like while it goes: a live table, plain lines, or JSON."""
