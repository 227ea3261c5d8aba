#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| evrepl::front_door::fuzz::client_text(bytes));
