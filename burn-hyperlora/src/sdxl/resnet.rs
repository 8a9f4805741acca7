//! Residual convolution blocks, down- and upsampling.
