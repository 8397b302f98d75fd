"""What a request leaves behind: its byte-exact specification, page and slot accounting, device pools. The bottom floor."""
