// fetch.mjs URL TIMES: what node gets, by turns with fetch (undici) and with node:http.
import http from "node:http";

const [url, times] = process.argv.slice(2);

const byFetch = async () => (await fetch(url, { signal: AbortSignal.timeout(5000) })).text();

const byHttp = () =>
  new Promise((resolve, reject) => {
    const collect = (response) => response.setEncoding("utf8").once("data", resolve).on("error", reject);
    http.get(url, { agent: false, timeout: 5000 }, collect).on("error", reject);
  });

for (let turn = 0; turn < Number(times); turn++) {
  console.log(await (turn % 2 === 0 ? byFetch() : byHttp()));
}
