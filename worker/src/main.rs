//! `worker`: the node daemon, the rank, and the tools that need torch.
#![forbid(unsafe_code)]

fn main() {}
