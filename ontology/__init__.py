"""What the fleet knows about itself: vocabulary, descriptions, store, registry, queries."""
