// node describe.js DASHBOARD.json RECORDING.json[.gz]: what each panel shows, as JSON, without a browser.
'use strict';

const { readFileSync } = require('fs');
const { gunzipSync } = require('zlib');

// Grafana's library looks for a browser when it is loaded.
const browser = {
  navigator: { language: 'en-US', languages: ['en-US'] },
  document: { createElement: () => ({ style: {} }), documentElement: { style: {} } },
  window: globalThis,
};
for (const [name, value] of Object.entries(browser)) {
  Object.defineProperty(globalThis, name, { value, configurable: true });
}
const { createTheme } = require('@grafana/data');
const { describe } = require('./panels.js');

function read(file) {
  const bytes = readFileSync(file);
  return JSON.parse(file.endsWith('.gz') ? gunzipSync(bytes) : bytes);
}

async function main(dashboardFile, recordingFile) {
  const { panels } = read(dashboardFile);
  const recording = read(recordingFile);
  const theme = createTheme({ colors: { mode: 'dark' } });
  const shown = [];
  for (const panel of panels) shown.push(await describe(panel, recording, theme));
  process.stdout.write(JSON.stringify(shown, null, 1));
}

main(...process.argv.slice(2)).catch((error) => {
  console.error(error);
  process.exit(1);
});
