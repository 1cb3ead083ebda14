"""What each API takes and gives, as pydantic models: one file an API."""
