//! An application that writes a replicated cache: a thousand sessions at once, and what to do when one of them fails.
//!
//! ```console
//! $ cargo run --example writer -- config/us-east-1.toml sessions
//! ```

use std::error::Error;
use tokio::time::Instant;

use evrepl::config;
use evrepl::event::Op;
use evrepl::writer::{Writer, WriterError};
use futures_util::future::join_all;

/// Writes until Kafka holds the event, or the write has failed for good.
async fn save(writer: &Writer, cache: &str, user: u32) -> Result<(), WriterError> {
    let key = format!("user:{user}");
    let value = format!("{{\"cart\":{user}}}");
    // An hour to live; 7 are the application's own flags, for its serializer.
    let mut result = writer.set(cache, key.as_bytes(), value.as_bytes(), 7, 3600).await;
    for _ in 0..3 {
        match result {
            Ok(_) => return Ok(()),
            // Nothing may be known of memcached, but the other regions must look at the key again.
            Err(error) if error.must_be_announced() => {
                eprintln!("{key}: {error}; announcing it");
                result = writer.announce(cache, key.as_bytes(), Op::Set).await;
            }
            Err(error) if error.may_be_retried() => {
                eprintln!("{key}: {error}; writing it again");
                result = writer.set(cache, key.as_bytes(), value.as_bytes(), 7, 3600).await;
            }
            Err(error) => return Err(error),
        }
    }
    result.map(|_| ())
}

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<(), Box<dyn Error>> {
    let mut arguments = std::env::args().skip(1);
    let (Some(file), Some(cache)) = (arguments.next(), arguments.next()) else {
        return Err("usage: writer CONFIG CACHE".into());
    };
    let config = config::load(file.as_ref(), config::environment())?;
    // One for the whole process: it is cheap to clone, and to share.
    let writer = Writer::connect(&config).await?;
    let began = Instant::now();
    let saved = join_all((0..1000).map(|user| save(&writer, &cache, user))).await;
    let failed = saved.iter().filter(|result| result.is_err()).count();
    println!(
        "{} saved, {failed} failed, in {:?}",
        saved.len() - failed,
        began.elapsed()
    );
    println!("{:?}", writer.get(&cache, b"user:17").await?);
    Ok(())
}
