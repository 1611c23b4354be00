// What Rust needs of torch's CUDA libraries and tch does not bind: graphs, the stream that they are captured on, and
// deterministic algorithms. Built without those libraries, and opened after them.

#include <ATen/Context.h>
#include <ATen/cuda/CUDAGraph.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAStream.h>
#include <cuda_runtime_api.h>

#include <cstdlib>

#include "../guarded.h"

extern "C" {

// Bytes of the current device: those that nobody uses, and all.
const char* vicuna_device_memory(size_t* unused, size_t* total) {
    return guarded([&] { C10_CUDA_CHECK(cudaMemGetInfo(unused, total)); });
}

// Where graphs are captured, and the memory that they share: only one of them may be in flight.
struct VicunaCapture {
    c10::cuda::CUDAStream stream;
    c10::cuda::CUDAStream before;
    at::MempoolId_t pool;
};

const char* vicuna_capture_new(VicunaCapture** capture) {
    return guarded([&] {
        *capture = new VicunaCapture{c10::cuda::getStreamFromPool(), c10::cuda::getCurrentCUDAStream(),
                                     at::cuda::graph_pool_handle()};
    });
}

void vicuna_capture_free(VicunaCapture* capture) { delete capture; }

// What the thread does next goes to the stream of captures, until vicuna_capture_leave.
const char* vicuna_capture_enter(VicunaCapture* capture) {
    return guarded([&] {
        capture->before = c10::cuda::getCurrentCUDAStream();
        capture->before.synchronize();
        c10::cuda::setCurrentCUDAStream(capture->stream);
    });
}

const char* vicuna_capture_leave(VicunaCapture* capture) {
    return guarded([&] {
        c10::cuda::setCurrentCUDAStream(capture->before);
        capture->stream.synchronize();
    });
}

// What the thread does next is recorded, not done.
const char* vicuna_graph_begin(VicunaCapture* capture, at::cuda::CUDAGraph** graph) {
    return guarded([&] {
        capture->stream.synchronize();
        *graph = new at::cuda::CUDAGraph();
        (*graph)->capture_begin(capture->pool, cudaStreamCaptureModeThreadLocal);
    });
}

const char* vicuna_graph_end(at::cuda::CUDAGraph* graph) {
    return guarded([&] { graph->capture_end(); });
}

// Does what was recorded, on the present stream.
const char* vicuna_graph_replay(at::cuda::CUDAGraph* graph) {
    return guarded([&] { graph->replay(); });
}

void vicuna_graph_free(at::cuda::CUDAGraph* graph) {
    (void)guarded([&] { delete graph; });
}

// Has torch choose kernels that give the same bits each time, and refuse operations that have none; or any kernels.
const char* vicuna_deterministic(bool exact) {
    return guarded([&] {
        // cuBLAS reads it with its first handle.
        if (exact) setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8", 1);
        at::globalContext().setDeterministicAlgorithms(exact, false);
        at::globalContext().setDeterministicFillUninitializedMemory(false);
        at::globalContext().setBenchmarkCuDNN(false);
    });
}
}
