//! Which faces stay, and why the others went.
