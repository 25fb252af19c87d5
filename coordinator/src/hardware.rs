//! What this machine has: cores, memory, GPUs. Read from `/proc` and, for the memory of GPUs,
//! from `nvidia-smi`; no driver library is linked.

use std::process::{Command, Stdio};

/// This machine.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Hardware {
    /// Cores that this process may use, at least 1.
    pub cores: u32,
    /// Main memory in bytes; `None` where it cannot be read.
    pub memory_bytes: Option<u64>,
    /// Whether bf16 matrix products run on the CPU's own instructions (AVX-512 and up, as libtorch asks).
    pub bf16_products: bool,
    /// NVIDIA GPUs, in the driver's order.
    pub gpus: Vec<Gpu>,
}

/// One GPU.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Gpu {
    /// The driver's name for it.
    pub name: String,
    /// Its memory in bytes; `None` where `nvidia-smi` is absent.
    pub memory_bytes: Option<u64>,
}

impl Hardware {
    /// Looks around. Nothing in here fails: what cannot be seen is not there.
    pub fn find() -> Self {
        let cores =
            std::thread::available_parallelism().map_or(1, |n| u32::try_from(n.get()).unwrap_or(u32::MAX));
        let meminfo = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
        let gpus = match gpus_of_smi(&smi()) {
            gpus if gpus.is_empty() => gpus_of_driver(),
            gpus => gpus,
        };
        let cpuinfo = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
        let bf16_products = has_bf16_products(&cpuinfo);
        Hardware { cores, memory_bytes: total_of_meminfo(&meminfo), bf16_products, gpus }
    }

    /// Memory of the smallest GPU, where all are known.
    pub fn smallest_gpu_bytes(&self) -> Option<u64> {
        let sizes: Option<Vec<u64>> = self.gpus.iter().map(|gpu| gpu.memory_bytes).collect();
        sizes?.into_iter().min()
    }
}

fn smi() -> String {
    let query = ["--query-gpu=name,memory.total", "--format=csv,noheader,nounits"];
    let output = Command::new("nvidia-smi").args(query).stdin(Stdio::null()).stderr(Stdio::null()).output();
    match output {
        Ok(output) if output.status.success() => String::from_utf8_lossy(&output.stdout).into_owned(),
        _ => String::new(),
    }
}

/// Lines like `NVIDIA A100-SXM4-80GB, 81920`, in MiB.
fn gpus_of_smi(text: &str) -> Vec<Gpu> {
    let gpu = |line: &str| {
        let (name, mib) = line.rsplit_once(',')?;
        let memory_bytes = mib.trim().parse::<u64>().ok().and_then(|mib| mib.checked_mul(1 << 20));
        Some(Gpu { name: name.trim().to_owned(), memory_bytes })
    };
    text.lines().filter_map(gpu).collect()
}

/// The driver lists its GPUs, without their memory.
fn gpus_of_driver() -> Vec<Gpu> {
    let Ok(entries) = std::fs::read_dir("/proc/driver/nvidia/gpus") else { return Vec::new() };
    let mut paths: Vec<_> = entries.flatten().map(|entry| entry.path().join("information")).collect();
    paths.sort();
    let name = |path| {
        let text = std::fs::read_to_string(path).unwrap_or_default();
        let model = text.lines().find_map(|line| line.strip_prefix("Model:"));
        model.unwrap_or("NVIDIA GPU").trim().to_owned()
    };
    paths.into_iter().map(|path| Gpu { name: name(path), memory_bytes: None }).collect()
}

fn has_bf16_products(cpuinfo: &str) -> bool {
    let flags = cpuinfo.lines().find_map(|line| line.strip_prefix("flags")).unwrap_or_default();
    ["avx512bw", "avx512vl", "avx512dq"].iter().all(|flag| flags.split_whitespace().any(|word| word == *flag))
}

fn total_of_meminfo(text: &str) -> Option<u64> {
    let line = text.lines().find_map(|line| line.strip_prefix("MemTotal:"))?;
    line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()?.checked_mul(1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_system_prints_is_understood() {
        let text = "NVIDIA A100-SXM4-80GB, 81920\nNVIDIA Odd, Name, [N/A]\n";
        let gpus = gpus_of_smi(text);
        assert_eq!(gpus[0], Gpu { name: "NVIDIA A100-SXM4-80GB".into(), memory_bytes: Some(80 << 30) });
        assert_eq!(gpus[1], Gpu { name: "NVIDIA Odd, Name".into(), memory_bytes: None });
        assert_eq!(Hardware { gpus, ..Default::default() }.smallest_gpu_bytes(), None);
        assert_eq!(total_of_meminfo("MemTotal:       65536 kB\nMemFree: 1 kB\n"), Some(64 << 20));
        assert_eq!(total_of_meminfo("MemTotal: many kB"), None);
        assert!(has_bf16_products("processor : 0\nflags\t\t: fpu avx512dq avx512bw avx512vl\n"));
        assert!(!has_bf16_products("flags\t\t: fpu avx2 avx512bwx avx512vl avx512dq\n"));
        assert!(Hardware::find().cores >= 1);
    }
}
