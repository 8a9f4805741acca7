//! The commands of `hyperlora`: parse, call the library, print.
