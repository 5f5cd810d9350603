"""One module for each way to quantize a weight: its fields, what each dialect calls them, and what they mean."""
