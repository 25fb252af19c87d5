//! `coordinator`: the command line, the control plane, repositories and datasets. No torch.
#![forbid(unsafe_code)]

fn main() {}
