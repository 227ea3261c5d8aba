//! What `evrepl-demo`, `evrepl-load` and `evrepl-faults` are made of.
//!
//! [`live`] is the demo: two regions with Kafka inside the demo's own process, a writer in each, and a watcher that
//! knows what every key must hold. [`fault_table`] is what the fault lab prints. [`runs`] are the load runs: a real Apache Kafka, many events, CPU and latency by
//! process. Both start their regions through `evrepl-lab`, whose way of reporting is to panic; the binaries turn that
//! into one plain line ([`plain_panics`]).

pub mod budget;
pub mod fault_table;
pub mod latency;
#[cfg(feature = "demo")]
pub mod live;
pub mod needs;
pub mod pace;
pub mod processes;
pub mod runs;
pub mod setting;
pub mod stop;
pub mod values;

/// Makes a panic one plain line, `<program>: <what went wrong>`; with `RUST_BACKTRACE` set it is Rust's own report.
pub fn plain_panics(program: &'static str) {
    if std::env::var_os("RUST_BACKTRACE").is_some() {
        return;
    }
    std::panic::set_hook(Box::new(move |info| {
        let payload = info.payload();
        let text = payload.downcast_ref::<String>().map(String::as_str);
        let what = text
            .or(payload.downcast_ref::<&str>().copied())
            .unwrap_or("something went wrong");
        eprintln!("{program}: {what}");
    }));
}

/// Removes the folder in which the lab keeps the files of this process: for ends that let nothing drop.
pub fn remove_leftovers() {
    let own = evrepl_lab::place::target()
        .join("lab")
        .join(std::process::id().to_string());
    let _ = std::fs::remove_dir_all(own);
}
