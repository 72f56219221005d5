"""The tensors that an adapter tunes, the places where they stand, and where the others are parked."""
