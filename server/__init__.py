"""The coordinator: rounds, aggregation, the Flower server side."""
