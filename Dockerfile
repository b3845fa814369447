# Two images from one file:  docker build --target site -t medfl-site .   and   --target coordinator
# CUDA: --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cu130
ARG PYTHON=3.12
FROM python:${PYTHON}-slim AS installed
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
WORKDIR /src
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY shared shared
COPY strategies strategies
COPY server server
COPY client client
COPY simulations simulations
COPY configs configs
RUN python -m venv /opt/medfl \
    && /opt/medfl/bin/pip install --no-cache-dir --index-url "$TORCH_INDEX" "$(grep '^torch==' constraints.txt)" \
    && /opt/medfl/bin/pip install --no-cache-dir -c constraints.txt '.[gpu,pacs,report]'

FROM python:${PYTHON}-slim AS base
RUN useradd --system --uid 49900 --user-group --home-dir /state --shell /usr/sbin/nologin medfl \
    && install -d -o medfl -g medfl -m 0700 /state
COPY --from=installed /opt/medfl /opt/medfl
ENV PATH=/opt/medfl/bin:$PATH HF_HUB_OFFLINE=1 MPLCONFIGDIR=/state/matplotlib
USER 49900
VOLUME /state

# docker run --read-only --tmpfs /tmp --cap-drop ALL --security-opt no-new-privileges \
#   -v /etc/medfl:/etc/medfl:ro -v /data:/data:ro -v medfl-north:/state medfl-site    (keys: and state: below /state)
FROM base AS site
ENTRYPOINT ["medfl-client", "--site", "/etc/medfl/site.yaml"]

# docker run --read-only --tmpfs /tmp --cap-drop ALL --security-opt no-new-privileges -p 9443:9443 \
#   -v medfl-server:/state medfl-coordinator    (medfl-server init /state/consortium makes what is there)
FROM base AS coordinator
EXPOSE 9443
ENTRYPOINT ["medfl-server", "--config", "/state/consortium/consortium.yaml"]
