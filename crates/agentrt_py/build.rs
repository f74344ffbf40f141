//! Copies the top-level `kernels/` folder into `OUT_DIR`, from where maturin ships it as `agentrt.kernels`.

use std::path::Path;
use std::{env, fs, io};

fn copy_dir(from: &Path, to: &Path) -> io::Result<()> {
    fs::create_dir_all(to)?;
    for entry in fs::read_dir(from)? {
        let entry = entry?;
        let name = entry.file_name();
        if name.to_string_lossy().starts_with('.') || name == "__pycache__" {
            continue;
        }
        if entry.file_type()?.is_dir() {
            copy_dir(&entry.path(), &to.join(name))?;
        } else {
            fs::copy(entry.path(), to.join(name))?;
        }
    }
    Ok(())
}

fn main() {
    let root = Path::new(&env::var("CARGO_MANIFEST_DIR").expect("set by cargo")).join("../../kernels");
    let out = Path::new(&env::var("OUT_DIR").expect("set by cargo")).join("kernels");
    println!("cargo:rerun-if-changed={}", root.display());
    if out.exists() {
        fs::remove_dir_all(&out).expect("old copy of kernels/ can be removed");
    }
    copy_dir(&root, &out).expect("kernels/ can be copied");
    println!("cargo:rustc-env=AGENTRT_PROFILE={}", env::var("PROFILE").expect("set by cargo"));
}
