//! The blocks of the UNet, unrolled into a flat list of operations.
