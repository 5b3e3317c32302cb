"""X-Omni-Mini: the tiny world, its prompt grammar and the small models that live in it."""
