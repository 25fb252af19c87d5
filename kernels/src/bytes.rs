//! Bytes of a CPU tensor, in place.
