-- From layout 4 to 5: what is paused is set aside.

CREATE INDEX aside ON request (route, rank, key) WHERE ready = 2;
