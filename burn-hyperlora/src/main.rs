//! `hyperlora`: train, generate, sample, evaluate.

fn main() {}
