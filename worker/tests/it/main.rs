//! Tests of the worker's library, in data-flow order; one program, so that libtorch is linked once.
#![forbid(unsafe_code)]
#![allow(clippy::unwrap_used, clippy::print_stdout, reason = "helpers of tests fail and speak as tests do")]

/// Models, batches and peers for the tests of the engine.
mod common;
/// Datasets, tokenizers and Python references for the tests of the data.
mod data_support;

mod data;
mod data_bad_input;
mod data_parity;
mod data_tokenizer;
mod chat;
mod comm;
mod comm_processes;
mod quant;
mod engine;
mod strategies;
mod checkpoints;
mod schedules;
mod fsdp2;
mod parity;
mod qlora;
mod families;
mod adapter_parity;
mod serve;
mod serve_parity;
mod evaluate;
mod torch_bin;
mod hub;
mod hub_tls;
mod gpu;
mod gpu_adapter;
