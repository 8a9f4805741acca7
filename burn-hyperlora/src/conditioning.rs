//! A batch to the conditions of the UNet and of the hypernetwork.
