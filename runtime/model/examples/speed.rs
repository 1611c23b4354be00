use std::time::Instant;
use vicuna_model::inference::Engine;
fn main() {
    let device = vicuna_model::device::open(None).unwrap();
    let model = vicuna_model::load(std::path::Path::new(&std::env::args().nth(1).unwrap())).unwrap();
    for kind in [tch::Kind::Float, tch::Kind::BFloat16] {
        let engine = Engine::new(&model.config, &model.tensors, device, kind, None).unwrap();
        let prompt: Vec<u32> = (0..256).map(|i| 100 + i * 7).collect();
        for batch in [1usize, 2, 4, 8] {
            let mut seqs: Vec<_> = (0..batch).map(|_| { let mut s = engine.sequence(); let t = Instant::now(); drop(engine.prefill(&mut s, &prompt).unwrap()); let e=t.elapsed(); if batch==1 {println!("{kind:?} prefill {:.0} tok/s", 256.0/e.as_secs_f64());} s }).collect();
            let tokens = vec![5u32; batch];
            let started = Instant::now();
            let n = 10;
            for _ in 0..n {
                let l = engine.decode(&mut seqs.iter_mut().collect::<Vec<_>>(), &tokens).unwrap();
                let _v: Vec<f32> = l.get(0).try_into().unwrap();
            }
            let s = started.elapsed().as_secs_f64() / n as f64;
            println!("{kind:?} batch {batch}: {:.1} ms/step {:.1} tok/s", s * 1e3, batch as f64 / s);
        }
    }
}
