//! GPUs as NVML, the driver's own library, shows them. It is looked for when it is needed: a machine without one has none.

use std::time::{Duration, Instant};

use nvml_wrapper::Nvml;
use nvml_wrapper::enum_wrappers::device::{MemoryError, TemperatureSensor};
use nvml_wrapper::enums::device::UsedGpuMemory;
use tunefleet_proto::rpc::finding::Verdict;
use tunefleet_proto::rpc::{Finding, Gpu};

use super::finding;
use crate::metrics::GpuFigures;

const GIB: f64 = (1u64 << 30) as f64;
/// The driver takes some of each GPU; more than this, and somebody's process is there.
const IDLE_BYTES: u64 = 1 << 30;
/// How long the memory of a rank that was killed may take to come back.
const FREE_WITHIN: Duration = Duration::from_secs(30);
const LOOK_AGAIN: Duration = Duration::from_millis(200);

/// One GPU, as it is now.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Seen {
    gpu: Gpu,
    used_bytes: u64,
    /// Process and what it holds, where the driver tells.
    held_by: Vec<(u32, Option<u64>)>,
    /// Memory errors that could not be corrected since the driver was loaded, where they are counted.
    uncorrected: u64,
}

fn look() -> Result<Vec<Seen>, String> {
    let nvml = Nvml::init().map_err(|error| error.to_string())?;
    let count = nvml.device_count().map_err(|error| error.to_string())?;
    (0..count).map(|index| seen(&nvml, index).map_err(|error| format!("GPU {index}: {error}"))).collect()
}

fn seen(nvml: &Nvml, index: u32) -> Result<Seen, nvml_wrapper::error::NvmlError> {
    use nvml_wrapper::enum_wrappers::device::EccCounter;
    let device = nvml.device_by_index(index)?;
    let memory = device.memory_info()?;
    let uuid = device.uuid()?;
    let gpu = Gpu { index, uuid, name: device.name()?, memory_bytes: memory.total };
    // Not all drivers and containers tell these.
    let held_by = device.running_compute_processes().unwrap_or_default();
    let held_by = held_by.into_iter().map(|process| match process.used_gpu_memory {
        UsedGpuMemory::Used(bytes) => (process.pid, Some(bytes)),
        UsedGpuMemory::Unavailable => (process.pid, None),
    });
    let uncorrected = device.total_ecc_errors(MemoryError::Uncorrected, EccCounter::Volatile).unwrap_or(0);
    Ok(Seen { gpu, used_bytes: memory.used, held_by: held_by.collect(), uncorrected })
}

/// What the GPUs do now; none where the driver tells of none.
pub fn figures() -> Vec<GpuFigures> {
    let Ok(nvml) = Nvml::init() else { return Vec::new() };
    let count = nvml.device_count().unwrap_or(0);
    (0..count).filter_map(|index| figures_of(&nvml, index).ok()).collect()
}

fn figures_of(nvml: &Nvml, index: u32) -> Result<GpuFigures, nvml_wrapper::error::NvmlError> {
    let Seen { gpu, used_bytes, uncorrected, .. } = seen(nvml, index)?;
    let device = nvml.device_by_index(index)?;
    Ok(GpuFigures {
        index,
        uuid: gpu.uuid,
        name: gpu.name,
        memory_bytes: gpu.memory_bytes,
        used_memory_bytes: used_bytes,
        utilization_ratio: device.utilization_rates().ok().map(|rates| f64::from(rates.gpu) / 100.0),
        power_watts: device.power_usage().ok().map(|milliwatts| f64::from(milliwatts) / 1000.0),
        temperature_celsius: device.temperature(TemperatureSensor::Gpu).ok().map(f64::from),
        uncorrected_errors: uncorrected,
    })
}

/// The GPUs of this machine; none where the driver tells of none.
pub fn listed() -> Vec<Gpu> {
    look().unwrap_or_default().into_iter().map(|seen| seen.gpu).collect()
}

/// What there is to say of GPUs; `wanted` is how many ranks would see.
pub fn findings(wanted: u32) -> Vec<Finding> {
    if wanted == 0 {
        return vec![finding("GPUs", Verdict::Ok, "none: ranks compute on the CPU".to_owned())];
    }
    match look() {
        Ok(seen) => judged(&seen, wanted),
        Err(error) => {
            let detail = format!("{wanted} are there, and the driver does not answer: {error}");
            vec![finding("GPUs", Verdict::Critical, detail)]
        }
    }
}

fn judged(seen: &[Seen], wanted: u32) -> Vec<Finding> {
    let mut found = Vec::new();
    if (seen.len() as u32) < wanted {
        let detail = format!("{wanted} are there, and the driver shows {}", seen.len());
        found.push(finding("GPUs", Verdict::Critical, detail));
    }
    for Seen { gpu, used_bytes, held_by, uncorrected } in seen {
        let (used, total) = (*used_bytes as f64 / GIB, gpu.memory_bytes as f64 / GIB);
        let what = format!("{} {}, {used:.1} of {total:.0} GiB used", gpu.name, gpu.uuid);
        let (verdict, detail) = if *uncorrected > 0 {
            (Verdict::Critical, format!("{what}: {uncorrected} memory errors that could not be corrected"))
        } else if *used_bytes > IDLE_BYTES {
            (Verdict::Warning, format!("{what}{}", holders(held_by)))
        } else {
            (Verdict::Ok, what)
        };
        found.push(finding(&format!("GPU {}", gpu.index), verdict, detail));
    }
    found
}

fn holders(held_by: &[(u32, Option<u64>)]) -> String {
    let shown = held_by.iter().map(|(pid, bytes)| match bytes {
        Some(bytes) => format!("process {pid} holds {:.1} GiB", *bytes as f64 / GIB),
        None => format!("process {pid}"),
    });
    match shown.collect::<Vec<_>>() {
        all if all.is_empty() => String::new(),
        all => format!(" ({})", all.join(", ")),
    }
}

/// Waits until the memory of a GPU has come back from who had it before; `visible` is its number among those that
/// CUDA_VISIBLE_DEVICES leaves. Where the driver does not tell, that is not known, and not waited for.
///
/// # Errors
/// Who still has it after half a minute.
pub async fn wait_until_free(visible: u32) -> Result<(), String> {
    let names = std::env::var("CUDA_VISIBLE_DEVICES").ok();
    let look_at = move || Ok(pick(look()?, names.as_deref(), visible));
    wait_for(visible, FREE_WITHIN, look_at).await
}

/// The GPU that ranks know by the number `visible`.
fn pick(all: Vec<Seen>, names: Option<&str>, visible: u32) -> Option<Seen> {
    let is_it = |seen: &Seen| match names.map(|names| names.split(',').nth(visible as usize)) {
        None => seen.gpu.index == visible,
        Some(None) => false,
        Some(Some(name)) => match name.trim().parse::<u32>() {
            Ok(index) => seen.gpu.index == index,
            Err(_) => !name.trim().is_empty() && seen.gpu.uuid.starts_with(name.trim()),
        },
    };
    all.into_iter().find(is_it)
}

async fn wait_for(
    index: u32,
    limit: Duration,
    look: impl Fn() -> Result<Option<Seen>, String> + Clone + Send + 'static,
) -> Result<(), String> {
    let began = Instant::now();
    loop {
        let seen = tokio::task::spawn_blocking(look.clone()).await.map_err(|error| error.to_string())?;
        let Some(seen) = seen.ok().flatten().filter(|seen| seen.used_bytes > IDLE_BYTES) else {
            return Ok(());
        };
        if began.elapsed() > limit {
            return Err(format!(
                "{:.1} GiB of GPU {index} are still in use after {} s{}: end who holds them, or leave the GPU out by \
                 CUDA_VISIBLE_DEVICES",
                seen.used_bytes as f64 / GIB,
                limit.as_secs(),
                holders(&seen.held_by)
            ));
        }
        tokio::time::sleep(LOOK_AGAIN).await;
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU32, Ordering};

    use super::*;

    fn gpu(used_bytes: u64, uncorrected: u64) -> Seen {
        let gpu = Gpu { index: 0, uuid: "GPU-1".to_owned(), name: "A100".to_owned(), memory_bytes: 80 << 30 };
        Seen { gpu, used_bytes, held_by: vec![(42, Some(used_bytes))], uncorrected }
    }

    #[test]
    fn gpus_that_are_missing_used_or_broken_are_told_apart() {
        let verdicts =
            |seen: &[Seen], wanted| judged(seen, wanted).iter().map(Finding::verdict).collect::<Vec<_>>();
        assert_eq!(verdicts(&[gpu(0, 0)], 1), [Verdict::Ok]);
        assert_eq!(verdicts(&[gpu(0, 0)], 2), [Verdict::Critical, Verdict::Ok]);
        assert_eq!(verdicts(&[gpu(9 << 30, 0)], 1), [Verdict::Warning]);
        assert_eq!(verdicts(&[gpu(0, 3)], 1), [Verdict::Critical]);
        let held = judged(&[gpu(9 << 30, 0)], 1);
        assert!(held[0].detail.contains("process 42 holds 9.0 GiB"), "{held:?}");
    }

    #[test]
    fn a_gpu_is_known_by_the_number_or_name_that_ranks_see() {
        let all = || {
            let of = |index| Seen {
                gpu: Gpu { index, uuid: format!("GPU-{index}a"), ..Gpu::default() },
                ..gpu(0, 0)
            };
            vec![of(0), of(1), of(2)]
        };
        let picked = |names, visible| pick(all(), names, visible).map(|seen| seen.gpu.index);
        assert_eq!(picked(None, 1), Some(1));
        assert_eq!(picked(Some("2,0"), 0), Some(2));
        assert_eq!(picked(Some("GPU-1a, GPU-2"), 1), Some(2));
        assert_eq!(picked(Some("2"), 1), None);
        assert_eq!(picked(Some(""), 0), None);
    }

    #[tokio::test]
    async fn memory_of_a_gpu_is_waited_for_and_who_keeps_it_is_named() {
        static LOOKS: AtomicU32 = AtomicU32::new(0);
        let freed = || {
            let used = if LOOKS.fetch_add(1, Ordering::Relaxed) < 2 { 9 << 30 } else { 0 };
            Ok(Some(gpu(used, 0)))
        };
        wait_for(0, Duration::from_secs(30), freed).await.unwrap();
        assert!(LOOKS.load(Ordering::Relaxed) >= 3);
        let kept = || Ok(Some(gpu(9 << 30, 0)));
        let refused = wait_for(0, Duration::ZERO, kept).await.unwrap_err();
        assert!(refused.contains("9.0 GiB of GPU 0") && refused.contains("process 42"), "{refused}");
        wait_for(0, Duration::ZERO, || Err("no driver".to_owned())).await.unwrap();
    }
}
