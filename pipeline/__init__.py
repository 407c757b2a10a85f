"""What a person types: reads settings, wires stages, prints."""
