//! The evaluations of a job, by its ranks together.
