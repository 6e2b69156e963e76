//! `convert --tune`: the lowering of every engine chosen by what was measured on the GPU of this machine.

use super::Failure;
use super::progress::Progress;
use crate::backend::tensorrt::Library;
use crate::package::Writer;
use crate::spec::Conversion;

/// Refuses a machine that cannot measure, before any work is done.
#[cfg(feature = "engines")]
pub(super) fn check(library: &Library) -> Result<(), Failure> {
    match crate::backend::tensorrt::run::Runtime::new(library) {
        Ok(_) => Ok(()),
        Err(error) => Err(refusal(&error)),
    }
}

#[cfg(feature = "engines")]
fn refusal(error: &crate::backend::tensorrt::run::RunError) -> Failure {
    // What these errors advise is for running, not for tuning.
    Failure::input(format!("--tune measures on the GPU of this machine: {error}")).help(
        "leave --tune out for the choices that were best elsewhere, or take them from a machine with such a GPU: \
         `convert --tune --save-spec FILE` there, `convert --spec FILE` here",
    )
}

/// Measures, and puts the winners into the conversion and the figures into the package.
#[cfg(feature = "engines")]
pub(super) fn tune(
    writer: &mut Writer,
    library: &Library,
    conversion: &mut Conversion,
    capacities: &[usize],
    progress: &Progress,
) -> Result<(), Failure> {
    use super::engines;
    use crate::tune::measure::{TuneError, tune};

    let graph = engines::graph(&writer.package(), conversion)?;
    let profiles = engines::profiles(conversion, capacities);
    progress.step("tuning");
    // Attempts are few enough to be told one by one, and long enough for somebody to wonder.
    let told = |profile: &crate::network::Profile, attempt: &crate::tune::Attempt| {
        let result = match (&attempt.ms, &attempt.error) {
            (Some(ms), _) => format!("{ms:.3} ms"),
            (None, error) => error.as_deref().unwrap_or("not measured").to_string(),
        };
        progress.note(format!("{profile} {}: {result}", attempt.what));
    };
    let tuning = tune(
        library,
        &graph,
        &profiles,
        (&conversion.lowering, conversion.refit),
        engines::at_once(conversion.weights),
        told,
    );
    let tuning = tuning.map_err(|error| match error {
        TuneError::Gpu(error) => refusal(&error),
        other => Failure::input(other),
    })?;
    for profile in &tuning.profiles {
        progress.note(format!(
            "{}: {:.3} ms, {:.3} untuned",
            profile.profile, profile.ms, profile.untuned_ms
        ));
    }
    conversion.tuned = tuning.tuned();
    writer.tuning(tuning);
    Ok(())
}

#[cfg(not(feature = "engines"))]
pub(super) fn check(_: &Library) -> Result<(), Failure> {
    Err(crate::backend::tensorrt::LibraryError::NotCompiled.into())
}

#[cfg(not(feature = "engines"))]
pub(super) fn tune(_: &mut Writer, _: &Library, _: &mut Conversion, _: &[usize], _: &Progress) -> Result<(), Failure> {
    Err(crate::backend::tensorrt::LibraryError::NotCompiled.into())
}
