// Turns every C++ exception into a status and a message of this thread.
#pragma once
#include <exception>
#include <string>

#include "capi.h"

std::string &tf_error_slot();

template <typename Body>
int tf_guard(Body body) {
  try {
    body();
    return TF_OK;
  } catch (const std::exception &e) {
    tf_error_slot() = e.what();
  } catch (...) {
    tf_error_slot() = "unknown C++ exception";
  }
  return TF_ERROR;
}

int tf_no_cuda(const char *what);
