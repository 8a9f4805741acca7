//! Does it learn? Measurements on photos that training never saw.
