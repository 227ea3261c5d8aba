fn main() {
    let mut args = std::env::args().skip(1);
    match args.next().as_deref() {
        Some("run") => {
            let path = args.nth(1).unwrap();
            match evrepl::config::load(std::path::Path::new(&path), evrepl::config::environment()) {
                Ok(config) => std::process::exit(evrepl::run::run(config)),
                Err(e) => {
                    eprintln!("{e}");
                    std::process::exit(78)
                }
            }
        }
        Some("certs") => {
            let out = args.nth(1).unwrap();
            let r: Vec<String> = args.collect();
            println!("{:?}", evrepl::certs::issue(std::path::Path::new(&out), &r));
        }
        _ => {}
    }
}
