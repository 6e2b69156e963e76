//! Progress, cancellation, several builds at once.

use std::ops::ControlFlow;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use lapidary::backend::tensorrt::{self, BuildOptions, BuildProgress, EngineBuildError};
use lapidary::network::{LayerKind, UnaryOp};
use lapidary::tensor::DType;

use crate::net::{Net, build, dims, library};

fn chain(length: usize) -> Net {
    let mut net = Net::fixed();
    let mut x = net.input("x", DType::F32, dims([2, 3]));
    for i in 0..length {
        x = net.layer(
            &format!("sin{i}"),
            LayerKind::Unary(UnaryOp::Sin),
            [x],
            DType::F32,
            dims([2, 3]),
        );
    }
    net.0.outputs.push(x);
    net
}

#[test]
fn progress_rises_to_the_end() {
    let seen = Arc::new(Mutex::new(Vec::new()));
    let record = seen.clone();
    let observer = move |progress: BuildProgress<'_>| {
        record
            .lock()
            .unwrap()
            .push((progress.phase.to_string(), progress.fraction));
        ControlFlow::Continue(())
    };
    let options = BuildOptions {
        observer: Some(Arc::new(observer)),
        ..Default::default()
    };
    tensorrt::build(&library(), &chain(4).0, &options).unwrap();
    let seen = seen.lock().unwrap();
    assert!(seen.len() > 10, "{seen:?}");
    assert!(
        seen.windows(2).all(|pair| pair[0].1 <= pair[1].1),
        "never falls: {seen:?}"
    );
    assert!(seen.last().unwrap().1 > 0.8, "{seen:?}");
    assert!(seen.iter().any(|(phase, _)| phase == "Optimizing graph"), "{seen:?}");
}

#[test]
fn an_observer_cancels() {
    let calls = Arc::new(AtomicUsize::new(0));
    let count = calls.clone();
    let options = BuildOptions {
        observer: Some(Arc::new(move |_: BuildProgress<'_>| {
            match count.fetch_add(1, Ordering::SeqCst) {
                0..5 => ControlFlow::Continue(()),
                _ => ControlFlow::Break(()),
            }
        })),
        ..Default::default()
    };
    let error = tensorrt::build(&library(), &chain(4).0, &options).unwrap_err();
    assert!(
        matches!(&error, EngineBuildError::Cancelled { network } if network == "test"),
        "{error}"
    );
    assert_eq!(calls.load(Ordering::SeqCst), 6, "the observer is not asked again");
    build(&chain(4)).expect("the next build is not affected");
}

#[test]
fn several_threads_build_at_once() {
    let lengths = [1, 5, 9, 13];
    let sizes: Vec<usize> = std::thread::scope(|scope| {
        let builds = lengths.map(|length| scope.spawn(move || build(&chain(length)).unwrap().bytes().len()));
        builds.map(|build| build.join().unwrap()).to_vec()
    });
    assert!(sizes.iter().all(|size| *size > 1000), "{sizes:?}");
}
