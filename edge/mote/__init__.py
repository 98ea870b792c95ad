"""The C library, and the two scripts that build it for Python: `build_extension` and `codegen`."""
