-- 10 KiB that the app reads; the harness checks one answer by itself.
wrk.method = "POST"
wrk.body = string.rep("flaskbus!\n", 1024)
wrk.headers["Content-Type"] = "application/octet-stream"
