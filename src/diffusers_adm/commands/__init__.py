"""What every command shares: arguments, errors, and the processes that it runs in."""
