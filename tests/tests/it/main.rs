//! End-to-end tests of the programs, by what a user does; one program, so that it is linked once.
#![forbid(unsafe_code)]
#![allow(clippy::unwrap_used, reason = "helpers of tests fail as tests do")]

mod linkage;
mod documents;
mod convert;
mod bad_input;
mod plan_and_init;
mod plan_budget;
mod plan_measure;
mod collect;
mod collect_sources;
mod dataset;
mod whole_job;
mod adapter_job;
mod families;
mod chat;
mod early_stopping;
mod attached;
mod faults;
mod fault_menu;
mod full_disk;
mod kills;
mod strangers;
mod orchestration;
mod partitions;
mod scale;
mod security;
mod doctor;
mod evaluating;
mod serving;
mod page;
mod monitoring;
mod traces;
mod packages;
mod containers;
mod kubernetes;
mod soak;
