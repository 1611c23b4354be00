// How C++ tells Rust that something failed.

#pragma once

#include <exception>
#include <string>

namespace {

thread_local std::string failure;

// Runs `work`; null if it went well, else what went wrong, until the thread's next failure.
template <typename Work>
const char* guarded(Work work) {
    try {
        work();
        return nullptr;
    } catch (const std::exception& error) {
        failure = error.what();
        return failure.c_str();
    }
}

}  // namespace
