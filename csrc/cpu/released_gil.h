// SPDX-License-Identifier: Apache-2.0
// Python's lock, given back while C++ works.
#pragma once
#include <Python.h>
#include <unistd.h>

namespace moecomm {

// As nanobind's gil_scoped_release, but a daemon thread that is here when Python ends sleeps until the process is gone,
// as it does everywhere since Python 3.14. Before, Python ends the thread by unwinding its stack, which a destructor
// forbids: the whole process would abort.
class ReleasedGil {
public:
    ReleasedGil() : thread_(PyEval_SaveThread()) {}
    ReleasedGil(const ReleasedGil&) = delete;
    ReleasedGil& operator=(const ReleasedGil&) = delete;
    ~ReleasedGil() {
        try {
            PyEval_RestoreThread(thread_);
        } catch (...) {
            for (;;) pause();
        }
    }

private:
    PyThreadState* thread_;
};

}  // namespace moecomm
