//! What known GPUs can do, for plans that nobody measured.
//!
//! Peaks and memory bandwidths are those of NVIDIA's data sheets and architecture papers: bf16 with fp32
//! sums, dense. Links are what a rank of a machine full of such cards usually gets from its peers in
//! large collectives, below the data sheet's sum of both directions: over NVLink, or over PCIe where the
//! cards have none.

use serde::Serialize;

/// One kind of GPU.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct GpuModel {
    /// Its name here, for `--gpu`.
    pub name: &'static str,
    /// Peak of bf16 matrix products, FLOP/s.
    pub peak_flops: f64,
    /// Of its memory.
    pub memory_bytes_per_second: f64,
    /// To and from its peers in a collective.
    pub link_bytes_per_second: f64,
    /// All of them are in a driver's name for it, in lower case.
    #[serde(skip)]
    words: &'static [&'static str],
}

const fn model(
    name: &'static str,
    teraflops: f64,
    memory_gb: f64,
    link_gb: f64,
    words: &'static [&'static str],
) -> GpuModel {
    GpuModel {
        name,
        peak_flops: teraflops * 1e12,
        memory_bytes_per_second: memory_gb * 1e9,
        link_bytes_per_second: link_gb * 1e9,
        words,
    }
}

/// More particular names stand before those that they contain.
const MODELS: [GpuModel; 10] = [
    model("H200", 989.4, 4800.0, 370.0, &["h200"]),
    model("H100-PCIe", 756.0, 2000.0, 40.0, &["h100", "pcie"]),
    model("H100", 989.4, 3350.0, 370.0, &["h100"]),
    model("A100-PCIe", 312.0, 1935.0, 20.0, &["a100", "pcie"]),
    model("A100-40GB", 312.0, 1555.0, 230.0, &["a100", "40gb"]),
    model("A100-80GB", 312.0, 2039.0, 230.0, &["a100"]),
    model("L40S", 362.0, 864.0, 20.0, &["l40s"]),
    model("RTX-4090", 165.2, 1008.0, 12.0, &["4090"]),
    model("RTX-3090", 71.0, 936.0, 12.0, &["3090"]),
    model("A10", 125.0, 600.0, 20.0, &["a10"]),
];

impl GpuModel {
    /// What runs jobs that run elsewhere, where nobody says.
    pub fn usual() -> Self {
        MODELS[5]
    }

    /// By a driver's name, or by the user's.
    pub fn named(name: &str) -> Option<Self> {
        let name = name.to_lowercase();
        MODELS.into_iter().find(|model| model.words.iter().all(|word| name.contains(word)))
    }

    /// For clap.
    pub fn parse(text: &str) -> Result<Self, String> {
        let names: Vec<&str> = MODELS.iter().map(|model| model.name).collect();
        Self::named(text).ok_or_else(|| format!("no such GPU is known; known are {}", names.join(", ")))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn drivers_names_are_understood_and_so_are_our_own() {
        let found = |name: &str| GpuModel::named(name).map(|model| model.name);
        assert_eq!(found("NVIDIA A100-SXM4-80GB"), Some("A100-80GB"));
        assert_eq!(found("NVIDIA A100-SXM4-40GB"), Some("A100-40GB"));
        assert_eq!(found("NVIDIA A100 80GB PCIe"), Some("A100-PCIe"));
        assert_eq!(found("NVIDIA H100 80GB HBM3"), Some("H100"));
        assert_eq!(found("NVIDIA GeForce RTX 4090"), Some("RTX-4090"));
        assert_eq!(found("NVIDIA A10"), Some("A10"));
        assert_eq!(found("Tesla T4"), None);
        for model in MODELS {
            assert_eq!(found(model.name), Some(model.name));
        }
        assert_eq!(GpuModel::usual().name, "A100-80GB");
        assert!(GpuModel::parse("GTX 1080").unwrap_err().contains("H100"));
    }
}
