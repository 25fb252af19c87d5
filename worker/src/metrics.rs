//! What `worker daemon` shows to Prometheus: all names, labels and help texts. All of it is read at each scrape from what
//! the daemon knows of its ranks, so that nothing of a rank stays behind when it is gone.

use prometheus::core::Collector;
use prometheus::process_collector::ProcessCollector;
use prometheus::{Error, GaugeVec, IntCounterVec, Opts, Registry, TextEncoder};
use tunefleet_proto::rpc::{Beat, StepDone};

/// A daemon and its ranks at one moment.
#[derive(Debug, Default)]
pub struct Figures {
    /// Ranks that it has room for.
    pub slots: u32,
    /// Whether it has a session with its coordinator.
    pub is_connected: bool,
    /// Reports that the coordinator has not acknowledged yet.
    pub unacknowledged: usize,
    /// Rank processes that have exited: cleanly, and not.
    pub exits: [u64; 2],
    /// Those that run.
    pub ranks: Vec<RankFigures>,
    /// GPUs, as the driver shows them.
    pub gpus: Vec<GpuFigures>,
}

/// One rank.
#[derive(Debug, Default)]
pub struct RankFigures {
    /// Whose.
    pub job: String,
    /// Of which stage.
    pub stage: &'static str,
    /// Its number.
    pub rank: u32,
    /// Empty on a CPU.
    pub gpu_uuid: String,
    /// The last step that it told of.
    pub last_step: Option<StepDone>,
    /// Where it is.
    pub beat: Option<Beat>,
}

/// One GPU; what its driver does not tell is absent.
#[derive(Debug, Default)]
pub struct GpuFigures {
    /// Number on this machine.
    pub index: u32,
    /// As DCGM and `nvidia-smi -L` name it.
    pub uuid: String,
    /// E.g. `NVIDIA A100-SXM4-80GB`.
    pub name: String,
    /// Of its memory.
    pub memory_bytes: u64,
    /// See `memory_bytes`.
    pub used_memory_bytes: u64,
    /// Share of the last moment in which it computed.
    pub utilization_ratio: Option<f64>,
    /// Now.
    pub power_watts: Option<f64>,
    /// Of the chip.
    pub temperature_celsius: Option<f64>,
    /// Memory errors that could not be corrected since the driver was loaded.
    pub uncorrected_errors: u64,
}

struct Page {
    registry: Registry,
}

impl Page {
    fn gauge(&self, name: &str, help: &str, labels: &[&str]) -> Result<GaugeVec, Error> {
        self.add(GaugeVec::new(Opts::new(name, help), labels)?)
    }

    fn counter(&self, name: &str, help: &str, labels: &[&str]) -> Result<IntCounterVec, Error> {
        self.add(IntCounterVec::new(Opts::new(name, help), labels)?)
    }

    fn add<T: Collector + Clone + 'static>(&self, family: T) -> Result<T, Error> {
        self.registry.register(Box::new(family.clone()))?;
        Ok(family)
    }

    /// A value that there is one of.
    fn one(&self, name: &str, help: &str, value: f64) -> Result<(), Error> {
        self.gauge(name, help, &[])?.with_label_values::<&str>(&[]).set(value);
        Ok(())
    }

    /// A value of each rank that has one.
    fn of_ranks(
        &self,
        ranks: &[RankFigures],
        name: &str,
        help: &str,
        value: impl Fn(&RankFigures) -> Option<f64>,
    ) -> Result<(), Error> {
        let family = self.gauge(name, help, &["job", "rank"])?;
        for rank in ranks {
            if let Some(value) = value(rank) {
                family.with_label_values(&[&rank.job, &rank.rank.to_string()]).set(value);
            }
        }
        Ok(())
    }

    /// A value of each GPU that tells it.
    fn of_gpus(
        &self,
        gpus: &[GpuFigures],
        name: &str,
        help: &str,
        value: impl Fn(&GpuFigures) -> Option<f64>,
    ) -> Result<(), Error> {
        let family = self.gauge(name, help, &["gpu_uuid"])?;
        for gpu in gpus {
            if let Some(value) = value(gpu) {
                family.with_label_values(&[&gpu.uuid]).set(value);
            }
        }
        Ok(())
    }
}

/// The page of one scrape, in Prometheus' text format.
///
/// # Errors
/// When two metrics have one name.
pub fn page(figures: &Figures) -> Result<String, Error> {
    let page = Page { registry: Registry::new() };
    daemon(&page, figures)?;
    ranks(&page, &figures.ranks)?;
    gpus(&page, &figures.gpus)?;
    page.registry.register(Box::new(ProcessCollector::for_self()))?;
    TextEncoder::new().encode_to_string(&page.registry.gather())
}

fn daemon(page: &Page, figures: &Figures) -> Result<(), Error> {
    let build = page.gauge(
        "tunefleet_daemon_build_info",
        "1, labelled with the version of this daemon",
        &["version"],
    )?;
    build.with_label_values(&[env!("CARGO_PKG_VERSION")]).set(1.0);
    let connected = f64::from(u8::from(figures.is_connected));
    page.one("tunefleet_daemon_slots", "Ranks that this worker has room for", f64::from(figures.slots))?;
    page.one("tunefleet_daemon_ranks", "Rank processes that run now", figures.ranks.len() as f64)?;
    page.one("tunefleet_daemon_connected", "1 while there is a session with the coordinator", connected)?;
    page.one(
        "tunefleet_daemon_unacknowledged_reports",
        "Reports that the coordinator has not acknowledged yet; they are kept on disk",
        figures.unacknowledged as f64,
    )?;
    let exits = page.counter(
        "tunefleet_daemon_rank_exits_total",
        "Rank processes that have exited since this daemon began, by result",
        &["result"],
    )?;
    for (result, count) in ["clean", "failed"].into_iter().zip(figures.exits) {
        exits.with_label_values(&[result]).inc_by(count);
    }
    Ok(())
}

fn ranks(page: &Page, ranks: &[RankFigures]) -> Result<(), Error> {
    let info = page.gauge(
        "tunefleet_rank_info",
        "1, labelled with the GPU that a rank computes on, as DCGM names it; empty on a CPU",
        &["job", "rank", "stage", "gpu_uuid"],
    )?;
    let section = page.gauge(
        "tunefleet_rank_section_info",
        "1 for the section of the training loop that a rank is in",
        &["job", "rank", "section"],
    )?;
    for rank in ranks {
        let number = rank.rank.to_string();
        info.with_label_values(&[rank.job.as_str(), &number, rank.stage, &rank.gpu_uuid]).set(1.0);
        if let Some(beat) = rank.beat.as_ref().filter(|beat| !beat.section.is_empty()) {
            section.with_label_values(&[rank.job.as_str(), &number, &beat.section]).set(1.0);
        }
    }
    page.of_ranks(ranks, "tunefleet_rank_step", "Optimizer updates done", |rank| {
        Some(rank.beat.as_ref()?.step as f64)
    })?;
    page.of_ranks(
        ranks,
        "tunefleet_rank_progress_age_seconds",
        "Since a rank's step or section last changed",
        |rank| Some(rank.beat.as_ref()?.seconds),
    )?;
    let of_step = |value: fn(StepDone) -> f64| move |rank: &RankFigures| rank.last_step.map(value);
    page.of_ranks(
        ranks,
        "tunefleet_rank_step_duration_seconds",
        "Mean duration of a step, as last logged",
        of_step(|step| step.step_seconds),
    )?;
    page.of_ranks(
        ranks,
        "tunefleet_rank_data_wait_seconds",
        "Of these, waited for batches; a rank on a GPU computes meanwhile",
        of_step(|step| step.data_wait_seconds),
    )?;
    page.of_ranks(
        ranks,
        "tunefleet_rank_collective_wait_seconds",
        "Of these, the thread stood still for collectives; on a GPU they are ordered on the device, and are not waited for",
        of_step(|step| step.collective_wait_seconds),
    )?;
    page.of_ranks(
        ranks,
        "tunefleet_rank_peak_memory_bytes",
        "Most that the rank's tensors took since it began",
        of_step(|step| step.peak_memory_bytes as f64),
    )
}

fn gpus(page: &Page, gpus: &[GpuFigures]) -> Result<(), Error> {
    let info = page.gauge(
        "tunefleet_gpu_info",
        "1, labelled with what a GPU is; absent without one",
        &["gpu_uuid", "gpu", "name"],
    )?;
    for gpu in gpus {
        info.with_label_values(&[gpu.uuid.as_str(), &gpu.index.to_string(), &gpu.name]).set(1.0);
    }
    page.of_gpus(gpus, "tunefleet_gpu_memory_bytes", "Memory of a GPU", |gpu| Some(gpu.memory_bytes as f64))?;
    page.of_gpus(gpus, "tunefleet_gpu_used_memory_bytes", "Of these, those that are taken", |gpu| {
        Some(gpu.used_memory_bytes as f64)
    })?;
    page.of_gpus(
        gpus,
        "tunefleet_gpu_utilization_ratio",
        "Share of the last moment in which a GPU computed",
        |gpu| gpu.utilization_ratio,
    )?;
    page.of_gpus(gpus, "tunefleet_gpu_power_watts", "What a GPU takes", |gpu| gpu.power_watts)?;
    page.of_gpus(gpus, "tunefleet_gpu_temperature_celsius", "How warm a GPU is", |gpu| {
        gpu.temperature_celsius
    })?;
    page.of_gpus(
        gpus,
        "tunefleet_gpu_uncorrected_memory_errors",
        "Memory errors that could not be corrected since the driver was loaded",
        |gpu| Some(gpu.uncorrected_errors as f64),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_page_shows_what_is_there_and_nothing_of_a_rank_that_is_gone() {
        let rank = RankFigures {
            job: "j".to_owned(),
            stage: "train",
            rank: 3,
            gpu_uuid: "GPU-1".to_owned(),
            last_step: Some(StepDone { step_seconds: 0.5, ..StepDone::default() }),
            beat: Some(Beat { step: 7, section: "step".to_owned(), seconds: 0.25 }),
        };
        let gpu = GpuFigures { uuid: "GPU-1".to_owned(), memory_bytes: 80, ..GpuFigures::default() };
        let figures =
            Figures { slots: 8, exits: [2, 1], ranks: vec![rank], gpus: vec![gpu], ..Figures::default() };
        let shown = page(&figures).unwrap();
        for line in [
            "tunefleet_rank_info{gpu_uuid=\"GPU-1\",job=\"j\",rank=\"3\",stage=\"train\"} 1",
            "tunefleet_rank_step{job=\"j\",rank=\"3\"} 7",
            "tunefleet_rank_step_duration_seconds{job=\"j\",rank=\"3\"} 0.5",
            "tunefleet_rank_section_info{job=\"j\",rank=\"3\",section=\"step\"} 1",
            "tunefleet_daemon_rank_exits_total{result=\"failed\"} 1",
            "tunefleet_gpu_memory_bytes{gpu_uuid=\"GPU-1\"} 80",
        ] {
            assert!(shown.lines().any(|found| found == line), "{line} is not in\n{shown}");
        }
        assert!(!shown.contains("tunefleet_gpu_power_watts"), "the driver does not tell");
        let shown = page(&Figures { ranks: Vec::new(), gpus: Vec::new(), ..figures }).unwrap();
        assert!(!shown.contains("job=\"j\"") && !shown.contains("GPU-1"), "{shown}");
    }
}
