"""What a Python model of Triton sees of its server: the module `triton_python_backend_utils`, and how it is loaded."""
