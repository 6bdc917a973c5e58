//! Regenerates the committed protobuf code and fails when it differs.

use std::{fs, path::Path};

#[test]
fn the_committed_code_is_what_the_proto_file_says() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let descriptors = protox::compile(["coalmine/v1/telemetry.proto"], [root.join("proto")])
        .expect("the proto file compiles");
    let out = std::env::temp_dir().join(format!("coalmine-proto-{}", std::process::id()));
    fs::create_dir_all(&out).unwrap();
    tonic_prost_build::configure()
        .build_transport(false)
        .bytes(".")
        .out_dir(&out)
        .compile_fds(descriptors)
        .expect("the code generates");
    let fresh = fs::read_to_string(out.join("coalmine.v1.rs")).unwrap();
    fs::remove_dir_all(&out).unwrap();

    let committed = root.join("src/generated/coalmine.v1.rs");
    if fs::read_to_string(&committed).unwrap_or_default() != fresh {
        fs::write(&committed, fresh).unwrap();
        panic!(
            "{} was out of date; it has been rewritten: look at the difference and commit it",
            committed.display()
        );
    }
}
